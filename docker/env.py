"""Write .env: the secrets that docker-compose.yml asks for, fresh and random, readable by their owner only.

python docker/env.py [--force] [FILE]
"""

import argparse
import base64
import hashlib
import os
import secrets
import sys
from pathlib import Path

# Letters, digits, - and _ only: they go into database addresses and into .env without quotes.
SECRETS = {
    "POSTGRES_PASSWORD": "The superuser of PostgreSQL",
    "AIRFLOW_DB_PASSWORD": "Airflow's own database user",
    "MLFLOW_DB_PASSWORD": "MLflow's own database user",
    "AIRFLOW_ADMIN_PASSWORD": "The login `admin` of the Airflow UI",
    "AIRFLOW_FERNET_KEY": "Encrypts the connections and variables that Airflow stores; keep a copy elsewhere",
    "AIRFLOW_SECRET_KEY": "Signs the sessions of the Airflow UI",
    "AIRFLOW_JWT_SECRET": "Signs the tokens by which Airflow's services and tasks recognise each other",
    "API_KEY": "A key for the predictions API, sent as header X-API-Key; `mlpkg key NAME` makes further ones",
    "API_KEY_DIGEST": "Its SHA-256, which is all that the API itself is given",
}


def make(name: str, known: dict[str, str]) -> str:
    "A fresh value of 256 bits; for API_KEY_DIGEST, the digest of the known API_KEY"
    if name == "API_KEY_DIGEST":
        return hashlib.sha256(known["API_KEY"].encode()).hexdigest()
    if name == "AIRFLOW_FERNET_KEY":  # must be 32 bytes in URL-safe base64, padding included
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return secrets.token_urlsafe(32)


def values(text: str) -> dict[str, str]:
    "The variables of an .env file, by name"
    return dict(line.strip().partition("=")[::2] for line in text.splitlines())


def write(path: Path, text: str) -> None:
    "Put a file in place in one move; nobody but its owner can ever read it"
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__).resolve().parents[1] / ".env")
    parser.add_argument("--force", action="store_true", help="replace the secrets that are there")
    args = parser.parse_args()
    old = args.file.read_text(encoding="utf-8") if args.file.exists() and not args.force else ""
    known = values(old)
    names = [name for name in SECRETS if not known.get(name)]
    if "API_KEY" in names and "API_KEY_DIGEST" not in names:
        names.append("API_KEY_DIGEST")  # the later line counts
    if not names:
        sys.exit(
            f"{args.file} is complete; nothing was changed. `--force` replaces every secret: only before the "
            "first start or after `docker compose down -v`, since the databases keep the passwords they were made with."
        )
    start = old.rstrip("\n") or "# Secrets for docker-compose.yml. Keep them out of git, and to yourself."
    for name in names:
        known[name] = make(name, known)
    lines = "".join(f"# {SECRETS[name]}\n{name}={known[name]}\n" for name in names)
    write(args.file, f"{start}\n\n{lines}")
    print(f"wrote {args.file}: {', '.join(names)}")


if __name__ == "__main__":
    main()
