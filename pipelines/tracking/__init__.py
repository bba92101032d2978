"""The MLflow room: nothing outside it knows MLflow."""
