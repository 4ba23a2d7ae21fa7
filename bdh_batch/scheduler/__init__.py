"""Who runs next. Imports neither torch nor the model; asyncio only in `mailbox` and `worker`."""
