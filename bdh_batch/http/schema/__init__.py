"""Request bodies: fields, types and ranges, and their translation into generation requests."""
