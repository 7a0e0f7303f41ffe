"""The doors in the order of the table, and how one becomes a row. Django has to be set up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from example.demo.clients import by_actors, by_cron, by_scripts, by_tasks, over_http
from example.demo.verdict import Row, overlaps
from example.stock import actors, tasks
from example.stock.models import Product

if TYPE_CHECKING:
    from collections.abc import Callable

    from example.demo.clients import Load, Told


@dataclass(frozen=True)
class Door:
    """One way into the critical section, the crowd that uses it, and the product that it sells."""

    name: str
    sku: str
    crowd: Callable[[str, Load], Told]
    guarded: bool = True


def doors(port: int) -> list[Door]:
    """Return every door; the views are served on `port`."""

    def view(address: str) -> Callable[[str, Load], Told]:
        return lambda sku, load: over_http(port, f"/buy/{address}/{sku}/", load)

    return [
        Door("view, unguarded", "view", view("unguarded"), guarded=False),
        Door("view, select_for_update", "view-row-lock", view("row-lock")),
        Door("view, @concurrency_safe", "view-guarded", view("guarded")),
        Door("view, 409 and try again", "view-or-busy", view("or-busy")),
        Door("scripts, with lock(...)", "script", by_scripts),
        Door("cron, run --tick=...", "cron", partial(by_cron, port)),
        Door("task, unguarded", "task", partial(by_tasks, tasks.buy_unguarded), guarded=False),
        Door("task, ConcurrencySafeTask", "task-guarded", partial(by_tasks, tasks.buy_guarded)),
        Door("actor, unguarded", "actor", partial(by_actors, actors.buy_unguarded), guarded=False),
        Door("actor, lock_key=...", "actor-guarded", partial(by_actors, actors.buy_guarded)),
    ]


def fill_shelf(sku: str, stock: int) -> Product:
    """Put a new product on sale."""
    product: Product = Product.objects.create(sku=sku, stock=stock)
    return product


def try_door(door: Door, load: Load) -> Row:
    """Fill the shelf, let the crowd in, and set what it was told beside what the database holds."""
    product = fill_shelf(door.sku, load.stock)
    told = door.crowd(door.sku, load)
    product.refresh_from_db()
    intervals = list(product.purchases.values_list("started", "ended"))
    answers = told.answers
    noticed = sum(answer.conflicts for answer in answers) + product.put_backs.count()
    return Row(
        door=door.name,
        guarded=door.guarded,
        stock=load.stock,
        left=product.stock,
        requests=len(answers),
        sold=sum(answer.sold is True for answer in answers),
        sold_out=sum(answer.sold is False for answer in answers),
        logged=len(intervals),
        overlaps=overlaps(intervals),
        conflicts=noticed if door.guarded else None,
        seconds=told.seconds,
        trouble=next((answer.trouble for answer in answers if answer.trouble), None),
    )
