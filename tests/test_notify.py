"""Messages as they arrive by e-mail, at a server that the tests start, and messages that cannot be delivered."""

import email
import socketserver
import threading

import pytest

from mlpkg.airflow.notify import Message, send
from mlpkg.settings import NotifySettings

DRIFT = Message("flights: drift", "late flights rose from 17 % to 33 %", "http://127.0.0.1:5000/#/runs/1")


class Mailbox(socketserver.StreamRequestHandler):
    "Just enough SMTP to receive a message"

    def handle(self):
        self.say("220 here")
        while line := self.rfile.readline().decode().strip():
            verb = line.split()[0].upper()
            if verb == "DATA":
                self.say("354 go on")
                letter = []
                while (part := self.rfile.readline()) != b".\r\n":
                    letter.append(part)
                self.server.letters.append(email.message_from_bytes(b"".join(letter)))
            self.say("221 bye" if verb == "QUIT" else "250 fine")

    def say(self, words):
        self.wfile.write(f"{words}\r\n".encode())


@pytest.fixture
def mailbox():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mailbox) as server:
        server.letters = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def rules(**values) -> NotifySettings:
    return NotifySettings(**values)


def test_an_email_arrives_with_its_link(mailbox):
    place = f"127.0.0.1:{mailbox.server_address[1]}"
    send(DRIFT, rules(channel="email", email="team@example.org", sender="mlpkg@example.org", smtp=place))
    (letter,) = mailbox.letters
    assert letter["Subject"] == "flights: drift" and letter["To"] == "team@example.org"
    assert "17 % to 33 %" in letter.get_payload() and DRIFT.link in letter.get_payload()


def test_a_title_cannot_add_headers(mailbox):
    place = f"127.0.0.1:{mailbox.server_address[1]}"
    send(Message("drift\nBcc: stranger@example.org", "text"), rules(channel="email", email="a@example.org", smtp=place))
    (letter,) = mailbox.letters
    assert letter["Bcc"] is None and "Bcc" in letter["Subject"]


def test_a_password_is_not_sent_in_clear_text(mailbox, monkeypatch):
    monkeypatch.setenv("MLPKG_SMTP_USER", "somebody")
    monkeypatch.setenv("MLPKG_SMTP_PASSWORD", "not to be seen")
    place = f"127.0.0.1:{mailbox.server_address[1]}"
    with pytest.raises(Exception, match="STARTTLS"):
        send(DRIFT, rules(channel="email", email="a@example.org", smtp=place))
    assert not mailbox.letters


@pytest.mark.parametrize(
    "values",
    [
        {"channel": "email", "email": "a@example.org", "smtp": "127.0.0.1:9"},
        {"channel": "webhook", "webhook": "http://127.0.0.1:9/"},
    ],
    ids=["email", "webhook"],
)
def test_a_message_that_cannot_be_delivered_raises_an_error_and_is_logged(values, caplog):
    with pytest.raises(OSError):
        send(DRIFT, rules(**values))
    assert "late flights rose" in caplog.text
