from __future__ import annotations

import pytest

from pipelines.files.secrets import UnsafeSecret, is_secret, load_secrets, refuse_credentials


def test_secrets_come_from_a_file_that_nobody_else_reads(tmp_path):
    file = tmp_path / "secrets.env"
    file.write_text("# of the hub\nHF_TOKEN=hf_x=y\n\nexport MLFLOW_TRACKING_TOKEN='t'\nAWS_REGION=eu\n")
    file.chmod(0o600)
    environment = {"NUWA_SECRETS": str(file), "AWS_REGION": "us"}
    assert load_secrets(environment) == ["HF_TOKEN", "MLFLOW_TRACKING_TOKEN"]
    assert environment["HF_TOKEN"] == "hf_x=y" and environment["MLFLOW_TRACKING_TOKEN"] == "t"
    assert environment["AWS_REGION"] == "us", "what is set wins"


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_file_that_others_may_read_is_refused(tmp_path, mode):
    file = tmp_path / "secrets.env"
    file.write_text("HF_TOKEN=x\n")
    file.chmod(mode)
    with pytest.raises(UnsafeSecret, match=r"others may read this file of secrets; chmod 600"):
        load_secrets({"NUWA_SECRETS": str(file)})


def test_a_line_that_is_none_is_named(tmp_path):
    file = tmp_path / "secrets.env"
    file.write_text("HF_TOKEN=x\nhf_oops\n")
    file.chmod(0o600)
    with pytest.raises(UnsafeSecret, match=r"line 2: allowed is NAME=value") as raised:
        load_secrets({"NUWA_SECRETS": str(file)})
    assert "hf_oops" not in str(raised.value)


def test_no_file_is_no_secrets(tmp_path):
    assert load_secrets({"NUWA_SECRETS": str(tmp_path / "none")}) == []


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("HF_TOKEN", "x", True),
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("AWS_ACCESS_KEY_ID", "x", True),
        ("MLFLOW_TRACKING_PASSWORD", "x", True),
        ("MLFLOW_TRACKING_URI", "postgresql://mlflow:pw@db/mlflow", True),
        ("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000", False),
        ("HF_HOME", "/shared/hf", False),
        ("AWS_REGION", "eu-west-1", False),
    ],
)
def test_what_is_secret(name, value, secret):
    assert is_secret(name, value) is secret


def test_a_uri_without_credentials_is_taken():
    refuse_credentials("--storage", ["/shared/nuwa", "s3://bucket/nuwa?endpoint_override=host:9000&scheme=http"])
