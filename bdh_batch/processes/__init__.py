"""The processes of a server: engines and front ends, and the supervisor that starts and watches them."""
