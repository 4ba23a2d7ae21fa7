"""What clients ask for: an object that any model can write in a few tokens once its form is kept to."""

# No `from __future__ import annotations`: clients read the annotations of `play`, and some read them as they are.
from typing import Literal

from pydantic import BaseModel, Field

Place = Literal["Verona", "Mantua"]
ACTS = (1, 2, 3, 4, 5)
PLACES = ("Verona", "Mantua")


class Scene(BaseModel):
    """A scene of a play."""

    act: int = Field(ge=1, le=5, description="The act's number.")
    place: Place


def play(act: Literal[1, 2, 3], place: Place) -> str:
    """Plays a scene.

    Args:
        act: The act's number.
        place: Where it is.
    """
    return f"Act {act}, in {place}."


def fits(arguments: dict[str, object]) -> bool:
    """Whether these are arguments of `play`."""
    return arguments.keys() == {"act", "place"} and arguments["act"] in (1, 2, 3) and arguments["place"] in PLACES
