#!/bin/sh
# Brings both databases to the versions of this image, and the admin of the Airflow UI to the password in .env.
# Safe to run again: `docker compose up` does so every time.
set -eu

mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
airflow db migrate

# The password goes in by standard input, where no list of processes shows it.
password() { printf '%s\n%s\n' "$AIRFLOW_ADMIN_PASSWORD" "$AIRFLOW_ADMIN_PASSWORD"; }
password | airflow users create --role Admin --username admin --firstname Airflow --lastname Admin --email admin@localhost
password | airflow users reset-password --username admin
