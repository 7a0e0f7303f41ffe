"""Django settings of the tests; mypy's Django plugin reads them, too.

`DATABASE_URL` names the server. Without it the tests start one, and it stands here before Django
reads this file.
"""

from __future__ import annotations

import os

from example.settings import database

#: Nobody listens there: a test that needs a database and was given none fails at once.
NO_SERVER = "postgresql://nobody@127.0.0.1:1/none"

SECRET_KEY = "not secret: nothing outlives a test"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
ROOT_URLCONF = "example.urls"
INSTALLED_APPS = ["concurrency_safe", "example.stock"]
DATABASES = {
    "default": database(os.environ.get("DATABASE_URL") or NO_SERVER) | {"CONN_MAX_AGE": 0},
}
DATABASES["other"] = DATABASES["default"] | {"TEST": {"MIRROR": "default"}}
