__version__ = "0.1.0"

from .lazy import put_off_parser

put_off_parser()  # before anything else imports jsonschema
