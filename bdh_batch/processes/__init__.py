"""The processes that a server is made of: what each of them loads, and who starts and watches them."""
