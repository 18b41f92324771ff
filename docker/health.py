"""Health check of a service: an address must answer and, if a component of Airflow is named, report it as healthy.

health.py http://localhost:5000/health
health.py http://api-server:8080/api/v2/monitor/health scheduler
"""

import json
import sys
import urllib.request


def main(url: str, component: str | None = None) -> None:
    "Exit with a message unless all is well"
    with urllib.request.urlopen(url, timeout=8) as answer:  # noqa: S310  (the address comes from docker-compose.yml)
        text = answer.read()
    if component:
        status = json.loads(text)[component]["status"]
        if status != "healthy":
            sys.exit(f"{component}: {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
