"""What is registered is there, and every recipe is one of its protocol."""

import pytest
import yaml

from fastmim import recipes
from fastmim.errors import ConfigError
from fastmim.evaluate.job import Task
from fastmim.evaluate.protocols import PROTOCOLS, load


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_a_protocol_runs_can_be_loaded(name):
    assert callable(load(PROTOCOLS[name].runner))
    assert isinstance(load(PROTOCOLS[name].task)(), Task)


@pytest.mark.parametrize("recipe", recipes.evaluations())
def test_recipes_are_complete_and_give_their_reasons(recipe):
    text = (recipes._EVALUATIONS / f"{recipe}.yaml").read_text()
    values = yaml.safe_load(text)
    protocol = values.pop("protocol")
    schema = PROTOCOLS[protocol].config
    needed = [f"{name}=x" for name, field in schema.model_fields.items() if field.is_required()]
    config = recipes.load_evaluation(schema, protocol, recipe, [*needed, "seed=3"])
    assert config.seed == 3 and text.startswith("# ")
    told = config.model_dump(mode="json", include=set(values))
    assert told == values
    assert all(getattr(config, key) != schema.model_fields[key].default for key in values), (
        "says what is the default"
    )
    others = [name for name in PROTOCOLS if name != protocol]
    with pytest.raises(ConfigError, match=f"protocol='{protocol}'; expected '{others[0]}'"):
        recipes.load_evaluation(PROTOCOLS[others[0]].config, others[0], recipe, [])


def test_a_recipe_of_one_s_own_is_changed_by_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("protocol: knn\nk: 7\ntemperature: 0.1\n")
    config = recipes.load_evaluation(PROTOCOLS["knn"].config, "knn", str(path), ["k=9"])
    assert (config.k, config.temperature) == (9, 0.1)
