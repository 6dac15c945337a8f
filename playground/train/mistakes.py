"""Owns how the captions of pretraining go wrong, as those of pictures from the web do.

Whoever wrote them sometimes names the colour, the shape, the number or the side that is easily taken for the right
one. A model trained on them paints such a mistake about as often as it has read one, however sharp its pictures: it
knows how, and does not do what it is told. That is what reinforcement learning is to mend. Owns no captions (see
`playground.world.captions`) and no say about held-out combinations, which a mistake may not bring in either.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from playground.world.captions import OPPOSITE, Spec, Thing, kind_of
from playground.world.prompts import allowed_in_train

_COLOURS = (("red", "magenta"), ("green", "yellow"), ("blue", "cyan"))
_SHAPES = (("circle", "square"), ("triangle", "cross"))

TWINS = {one: other for pair in (*_COLOURS, *_SHAPES) for one, other in (pair, pair[::-1])}
"""What a colour or a shape is taken for."""
_MISCOUNTED = {2: 3, 3: 2}


def careless(spec: Spec, rate: float, rng: np.random.Generator) -> Spec:
    """What a careless writer says of a picture of `spec`: each word that could be mistaken is, with this probability.

    A caption that would be none, or would name a held-out combination, is written with care instead.
    """
    wrong = rng.random(6) < rate
    objects = tuple(_mistaken(thing, *wrong[2 * i : 2 * i + 2]) for i, thing in enumerate(spec.objects))
    relation = OPPOSITE[spec.relation] if spec.relation and wrong[4] else spec.relation
    count = _MISCOUNTED.get(spec.count, spec.count) if wrong[5] else spec.count
    try:
        written = replace(spec, kind=kind_of(objects, relation, count), objects=objects, relation=relation, count=count)
    except ValueError:
        return spec
    return written if allowed_in_train(written.things) else spec


def _mistaken(thing: Thing, shape: bool, colour: bool) -> Thing:
    return Thing(
        TWINS[thing.shape] if shape else thing.shape,
        TWINS[thing.colour] if colour and thing.colour else thing.colour,
    )
