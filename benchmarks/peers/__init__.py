"""What a user would take instead: transformers and CTranslate2 on the same checkpoint."""
