"""A run's configuration refuses numbers that it can't compute with."""

import json
import math
import re

import pytest

from routing_jax.train.config import TrainConfig, config_from_dict, config_to_dict

FLOATS = [
    (part, name)
    for part, value in config_to_dict(TrainConfig()).items()
    if isinstance(value, dict)
    for name, number in value.items()
    if isinstance(number, float)
]


@pytest.mark.parametrize(("part", "name"), FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_a_number_that_is_not_finite_is_refused_in_every_field(part, name, value):
    with pytest.raises(ValueError, match=re.escape(f"{part}.{name} is {value}; ")):
        TrainConfig().replace(**{f"{part}__{name}": value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer__learning_rate": math.nan}, "optimizer.learning_rate is nan"),
        ({"model__rope_factors": (1.0,) * 31 + (math.inf,)}, "model.rope_factors.31 is inf"),
    ],
)
def test_what_is_accepted_is_said(changes, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared whole
        TrainConfig().replace(**changes)
    assert str(caught.value) == f"{said}; it must be finite, and at most 3.4e+38."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"first_batch": -1}, "first_batch is -1; it must be at least 0."),
        ({"routers_only": True}, "routers_only is True; it needs start_from, which is ''."),
    ],
)
def test_a_run_that_cannot_go_on_is_refused(changes, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        TrainConfig().replace(**changes)


def test_a_number_inside_a_part_of_a_part_is_refused():
    values = config_to_dict(TrainConfig())
    values["model"]["router"]["temperature"] = math.nan
    with pytest.raises(ValueError, match=r"^model\.router\.temperature is nan; it must "):
        config_from_dict(values)


def of_a_search_by_means(**sparse):
    values = json.loads(json.dumps(config_to_dict(TrainConfig())))
    del values["model"]["sparse"]["channels"]
    values["model"]["sparse"] |= {"means": 8, "taught": 0} | sparse
    return values


def test_a_config_from_before_a_search_by_channels_is_read_where_nothing_searches():
    assert config_from_dict(of_a_search_by_means()) == TrainConfig()


@pytest.mark.parametrize("sparse", [{"retrieval": "topk"}, {"taught": 64}])
def test_a_run_that_searched_otherwise_is_refused(sparse):
    with pytest.raises(ValueError, match=r"written by another version: .*(means|taught)"):
        config_from_dict(of_a_search_by_means(**sparse))
