"""What a model is given to read: texts, made or the user's own, and the questions of the retrieval tasks."""
