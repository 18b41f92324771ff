"""Messages as they arrive by e-mail, at a server that the tests start, and messages that cannot be delivered."""

import email
import http.server
import socketserver
import threading
import traceback

import pytest
from conftest import answering

from mlpkg.airflow.notify import Message, NotifyError, send
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


class Gateway(http.server.BaseHTTPRequestHandler):
    "Answers a POST with the status in its path, and sends it elsewhere"

    def do_POST(self):
        self.server.seen.append("POST")
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(int(self.path.split("/")[1]), "gone to /moved-xoGrKq7A9bWm")
        self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        self.server.seen.append("GET")
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        "Nothing"


@pytest.fixture
def gateway():
    with answering(Gateway) as server:
        server.seen = []
        yield server


@pytest.mark.parametrize("location", ["/moved-xoGrKq7A9bWm", "ftp://moved-xoGrKq7A9bWm/", "https://[xoGrKq7A9bWm"])
@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_a_message_that_is_redirected_is_not_lost_in_silence(gateway, status, location):
    gateway.location = location
    place = f"http://127.0.0.1:{gateway.server_port}/{status}/T024-xoGrKq7A9bWm"
    with pytest.raises(
        NotifyError, match=f"answered {status}, .*Give the address that it redirects to. Correct MLPKG_NOTIFY__WEBHOOK"
    ) as caught:
        send(DRIFT, rules(channel="webhook", webhook=place))
    assert gateway.seen == ["POST"] and "xoGrKq7A9bWm" not in "".join(traceback.format_exception(caught.value))


def test_an_error_of_the_webhook_is_reported_in_our_words(gateway):
    gateway.location = "/"
    place = f"http://127.0.0.1:{gateway.server_port}/404/T024"
    with pytest.raises(NotifyError, match="HTTP 404 Not Found") as caught:
        send(DRIFT, rules(channel="webhook", webhook=place))
    assert "xoGrKq7A9bWm" not in str(caught.value)
