"""The programs that a user could take instead: transformers and CTranslate2 on the same checkpoint."""
