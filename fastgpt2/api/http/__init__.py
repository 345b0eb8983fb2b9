"""The HTTP endpoint: Starlette on uvicorn. Neither numpy nor a model is imported here."""
