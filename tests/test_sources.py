"""What a page cannot show of sources: servers that break off, refuse or send secrets, slow downloads, a real S3 store.

The S3 test runs where AWS_ENDPOINT_URL (and credentials) point to a server; it makes a bucket of its own.
"""

import io
import os
import threading
import time
import traceback
import uuid
import zipfile
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mlpkg.data.lake import Lake
from mlpkg.data.sources import SourceError, open_source, read_frame

PARCELS = pd.DataFrame({"parcel": range(5000), "distance": np.random.default_rng(0).uniform(5, 900, 5000)})
CSV = PARCELS.to_csv(index=False).encode()


def as_parquet() -> bytes:
    file = io.BytesIO()
    PARCELS.to_parquet(file)
    return file.getvalue()


class Server(BaseHTTPRequestHandler):
    "Answers as the first folder of the path says"

    protocol_version = "HTTP/1.1"
    served: list[str]
    authorization: str | None

    def do_GET(self):
        Server.served.append(self.path)
        Server.authorization = self.headers["Authorization"]
        how = self.path.split("/")[1]
        body = as_parquet() if ".parquet" in self.path else CSV
        self.send_response({"gone": 410, "broken": 500, "moved": 302}.get(how, 200), "because of 5ec2e7")
        if how == "moved":
            self.send_header("Location", "ftp://me:5ec2e7@127.0.0.1/p.csv")
        if how == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in (body[:1000], body[1000:], b""):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if how == "slow":
            for i in range(100):
                time.sleep(0.05)
                self.wfile.write(body[i : i + 1])
        self.wfile.write(body[:-500] if how == "torn" else body)
        self.close_connection = how == "torn"

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    Server.served = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.handle_error = lambda *args: None  # a client may hang up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def lake(tmp_path) -> Lake:
    return Lake(tmp_path / "lake", spill=tmp_path / "spill")


def rows(source) -> pd.DataFrame:
    return pa.Table.from_batches(source.read(["parcel", "distance"], []), source.schema).to_pandas()


@pytest.mark.parametrize("name", ["whole/p.csv", "chunked/p.csv", "whole/p.parquet", "chunked/p.parquet"])
def test_a_file_on_the_web_is_fetched_once_and_read_as_often_as_asked(name, site, lake):
    source = open_source(lake, f"{site}/{name}")
    for _ in range(2):
        pd.testing.assert_frame_equal(rows(source), PARCELS)
    assert len(Server.served) == 1
    pd.testing.assert_frame_equal(read_frame(f"{site}/{name}"), PARCELS, check_exact=name.endswith("parquet"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torn/p.csv", "broke off: 500 bytes are missing. Try again"),
        ("torn/p.parquet", "broke off: 500 bytes are missing. Try again"),
        ("gone/p.csv", "cannot be read: HTTP Error 410"),
        ("broken/p.csv", "cannot be read: HTTP Error 500"),
    ],
)
def test_a_server_that_fails_is_named_without_the_secrets_of_the_address(name, message, site, lake):
    for read in (lambda url: open_source(lake, url), read_frame):
        with pytest.raises(SourceError) as error:
            read(f"{site}/{name}?signature=5ec2e7")
        assert message in str(error.value) and f"{site}/{name}'" in str(error.value)
        assert "5ec2e7" not in str(error.value)


def test_a_server_that_is_not_there_is_a_source_error(lake):
    for read in (lambda url: open_source(lake, url), read_frame):
        for url in ("http://127.0.0.1:9/p.csv", "http://no such host/p.csv", "https://[::1/p.csv"):
            with pytest.raises(SourceError, match="cannot be read"):
                read(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:5ec2e7@127.0.0.1:9/x.csv",
        "http://user:5ec2e7@127.0.0.1:port/x.csv",
        "http://us/er:5ec2e7@127.0.0.1/x.csv",
        "http://user:5ec2e7/more@127.0.0.1/x.csv",
        "http://user:5ec2e7@[::1/x.csv",
        "http://5ec2e7@/x.csv",
        "HTTPS://u:5ec2e7@127.0.0.1:9/x.csv?sig=5ec2e7",
        " http://u:5ec2e7@127.0.0.1:9/x.csv?sig=5ec2e7",
        "http:/u:5ec2e7@127.0.0.1:9/x.csv",
        "ftp://u:5ec2e7@127.0.0.1:9/x.csv",
        "{site}/gone/x.csv?sig=5ec2e7&a=b c",
        "{site}/gone/x.csv?sig=5ec2e7",
        "{site}/moved/x.csv",
        "{site}/gone/x.csv#5ec2e7",
    ],
)
def test_nothing_that_is_raised_or_logged_shows_a_secret(url, site, lake):
    for read in (lambda url: open_source(lake, url), read_frame):
        with pytest.raises(SourceError, match="cannot be read") as error:
            read(url.format(site=site))
        assert "5ec2e7" not in "".join(traceback.format_exception(error.value))
        assert error.value.__context__ is None


def test_user_and_password_are_sent_as_a_header(site, lake):
    url = site.replace("http://", "HTTP://me%40home:w%3Aord@") + "/whole/p.csv?signature=5ec2e7"
    assert open_source(lake, url).name == f"{site}/whole/p.csv"
    assert b64decode(Server.authorization.removeprefix("Basic ")) == b"me@home:w:ord"
    assert Server.served == ["/whole/p.csv?signature=5ec2e7"]


def test_a_download_ends_however_slow_the_server_is(site, monkeypatch):
    monkeypatch.setattr("mlpkg.data.sources._longest", 0.5)
    with pytest.raises(SourceError, match="took longer than 0.5 seconds"):
        read_frame(f"{site}/slow/p.csv")


def test_a_zip_with_one_file_is_read_whatever_it_is_called(tmp_path):
    for names, count in (
        {("p.txt",): 1, ("d/", "d/p.csv", "note.txt"): 1, ("p.txt", "q.txt"): 0, ("p.csv", "q.csv"): 2}
    ).items():
        with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
            for name in names:
                archive.writestr(name, "" if name.endswith("/") else CSV)
        if count == 1:
            pd.testing.assert_frame_equal(read_frame(f"{tmp_path}/p.zip"), PARCELS)
        else:
            with pytest.raises(SourceError, match=f"holds {count} CSV files"):
                read_frame(f"{tmp_path}/p.zip")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for open files in /proc")
def test_a_download_is_kept_in_the_spill_folder_as_long_as_the_source_is_used(site, lake, tmp_path):
    def opened() -> int:
        links = [os.path.realpath(link) for link in Path("/proc/self/fd").glob("*")]
        return sum(name.startswith(f"{tmp_path}/spill/") for name in links)

    source = open_source(lake, f"{site}/whole/p.parquet")
    assert opened() == 1 and list((tmp_path / "spill").iterdir()) == []
    del source
    assert opened() == 0


def test_filters_may_look_at_columns_that_are_not_kept(lake, tmp_path):
    PARCELS.to_csv(tmp_path / "p.csv", index=False)
    PARCELS.to_parquet(tmp_path / "p.parquet")
    for name in ("p.csv", "p.parquet"):
        source = open_source(lake, f"{tmp_path}/{name}")
        found = pa.Table.from_batches(source.read(["distance"], [[("parcel", "<", 2)], [("parcel", "==", 7)]]))
        assert found.schema.names == ["distance"] and found.num_rows == 3


def test_a_file_in_an_s3_store(lake):
    if not os.environ.get("AWS_ENDPOINT_URL"):
        pytest.skip("set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of an S3 server to test with it")
    boto3 = pytest.importorskip("boto3", reason="pip install boto3 to test with an S3 server")
    bucket = f"sources-{uuid.uuid4().hex[:12]}"
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="in/p.csv", Body=CSV)
    client.put_object(Bucket=bucket, Key="in/p.parquet", Body=as_parquet())
    for name in ("p.csv", "p.parquet"):
        pd.testing.assert_frame_equal(rows(open_source(lake, f"s3://{bucket}/in/{name}")), PARCELS)
    with pytest.raises(SourceError, match="absent.csv' cannot be read"):
        read_frame(f"s3://{bucket}/in/absent.csv")
