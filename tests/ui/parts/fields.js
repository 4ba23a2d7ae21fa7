async () => {
  const { valueOf, structured } = await import("/ui/talk/fields.js");
  const tried = (kind, typed) => { try { return valueOf({ name: "f", kind }, typed); } catch (error) { return error.message; } };
  return [
    tried("number", " 1.5 "), tried("number", "x"), tried("integer", "-3"), tried("integer", "1.5"), tried("integer", "9007199254740993"),
    tried("boolean", "false"), tried("lines", "a\n\\n\nb "), tried("integers", "1, 2 3"), tried("object", "{"), tried("string", " a ") ?? null,
    tried("number", "  ") ?? null, structured("choice", "a\n\nb"), structured("json", "{}"), structured("", "a") ?? null,
  ];
}
