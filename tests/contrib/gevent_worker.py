"""Run Dramatiq's workers on gevent, as the program dramatiq-gevent does."""

from gevent import monkey  # type: ignore[import-untyped]

monkey.patch_all()

if __name__ == "__main__":
    import sys

    from dramatiq.cli import main

    sys.exit(main())  # type: ignore[no-untyped-call]
