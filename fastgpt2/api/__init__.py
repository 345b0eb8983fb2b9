"""What people and programs talk to: the Python client and the HTTP endpoint. Never imports numpy or a model."""
