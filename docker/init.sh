#!/bin/sh
# Migrates both databases to the versions in this image, and sets the password of the Airflow UI's admin from .env.
# Safe to run again: `docker compose up` does so every time.
set -eu

mlflow db upgrade "$MLFLOW_BACKEND_STORE_URI"
airflow db migrate

# The password is passed on standard input, so that no list of processes shows it.
password() { printf '%s\n%s\n' "$AIRFLOW_ADMIN_PASSWORD" "$AIRFLOW_ADMIN_PASSWORD"; }
password | airflow users create --role Admin --username admin --firstname Airflow --lastname Admin --email admin@localhost
password | airflow users reset-password --username admin
