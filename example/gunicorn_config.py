"""How gunicorn serves the example: `gunicorn -c python:example.gunicorn_config example.wsgi`."""

from __future__ import annotations

#: Several processes with several threads each: both kinds of neighbours meet in the section.
workers = 2
threads = 8
worker_class = "gthread"
graceful_timeout = 2
loglevel = "warning"
# Newer releases open a control socket in the home directory; older ones ignore the name.
control_socket_disable = True
