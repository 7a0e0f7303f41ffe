"""docker-compose.yml offers the servers that the example's settings and its own comment name."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
EXPORTS = re.findall(r"^#\s+export (\w+)=(\S+)$", TEXT, re.MULTILINE)

#: Where each image is told what an address holds: user, password, database (Valkey has none).
CREDENTIALS = {
    "postgres": ("POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"),
    "pgbouncer": ("DB_USER", "DB_PASSWORD", "DB_NAME"),
    "rabbitmq": ("RABBITMQ_DEFAULT_USER", "RABBITMQ_DEFAULT_PASS", None),
    "valkey": (None, None, None),
}


def published_ports(service: dict[str, Any]) -> list[tuple[str, int]]:
    return [(host, int(port)) for host, port, _ in (line.split(":") for line in service["ports"])]


def service_at(address: SplitResult) -> str:
    names = [name for name, service in SERVICES.items() if (address.hostname, address.port) in published_ports(service)]
    assert len(names) == 1, f"{address.netloc} is published by {names}"
    return names[0]


def test_it_has_the_servers_that_the_project_speaks_to() -> None:
    assert set(SERVICES) == {"postgres", "valkey", "rabbitmq", "pgbouncer"}


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_to_a_release(name: str) -> None:
    _, tag = SERVICES[name]["image"].rsplit(":")

    assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?(-[a-z0-9-]+)?", tag)


@pytest.mark.parametrize("name", SERVICES)
def test_every_server_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]

    assert check["test"][0] in {"CMD", "CMD-SHELL"}
    assert check["retries"] > 0


@pytest.mark.parametrize("name", SERVICES)
def test_servers_listen_on_this_machine_alone(name: str) -> None:
    assert {host for host, _ in published_ports(SERVICES[name])} == {"127.0.0.1"}


@pytest.mark.parametrize(("variable", "url"), EXPORTS)
def test_documented_addresses_lead_to_a_service_that_lets_them_in(variable: str, url: str) -> None:
    address = urlsplit(url)

    name = service_at(address)

    environment = SERVICES[name].get("environment", {})
    user, password, database = CREDENTIALS[name]
    assert address.username == (user and environment[user])
    assert address.password == (password and environment[password])
    if database:
        assert address.path == f"/{environment[database]}"


def test_every_server_is_documented_by_an_address() -> None:
    assert {service_at(urlsplit(url)) for _, url in EXPORTS} == set(SERVICES)


@pytest.mark.parametrize("variable", ["DATABASE_URL", "CELERY_BROKER_URL"])
def test_the_example_goes_to_these_servers_by_default(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable, raising=False)

    settings = runpy.run_path(str(ROOT / "example" / "settings.py"))

    assert settings[variable] == dict(reversed(EXPORTS))[variable]
