async () => {
  const { StreamedText } = await import("/ui/talk/streamed_text.js");
  const element = document.createElement("div");
  document.body.append(element);
  const shown = new StreamedText(element);
  let all = "";
  for (let token = 0; token < 100000; token += 1) {
    const text = token % 40 === 39 ? "\n" : token % 7 ? "abc " : "\u{1F409}";
    all += text;
    shown.append(text);
    if (token % 100 === 0) shown.flush();
  }
  shown.flush();
  const blocks = element.querySelectorAll(".block").length;
  const same = element.textContent === all;
  for (let more = 0; more < 30; more += 1) { shown.append("x".repeat(100000)); shown.flush(); }
  const kept = [...element.querySelectorAll(".block")].map((block) => block.textContent).join("");
  const note = element.querySelector(".hint").textContent;
  element.remove();
  return { blocks, same, kept: kept.length, ends: kept.endsWith("xxxx"), note };
}
