"""Joint training: one expert on all stages, a yardstick for merges."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, chain

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.schema import Recipe, Train
from hf_contmerge.train_strategies.replay import in_form_of, widest, with_features
from hf_contmerge.training._forms import Form
from hf_contmerge.training._mix import joined
from hf_contmerge.training.data import StageData, require_answers
from hf_contmerge.training.settings import make_strategies


def joint_data(data: Mapping[str, StageData], *, seed: int) -> StageData:
    """Return the shuffled union of all stages' examples.

    The order does not depend on the order of the stages. Texts become completions without a prompt if another stage has
    prompts, so that the loss covers what it covers stage by stage.

    Raises DataError for preference pairs, and for forms that cannot become one.
    """
    require_answers(data, "joint")
    names = sorted(data)
    forms: dict[Form, str] = {data[name].form: name for name in reversed(names)}
    form: Form = "prompt_completion" if "prompt_completion" in forms else data[names[0]].form
    like = data[forms[form]].train
    try:
        parts = [in_form_of(like, data[name].train, name) for name in names]
        features = widest(parts)
        parts = [with_features(rows, features) for rows in parts]
    except (DataError, ValueError) as error:
        kinds = ", ".join(f"{name}: {data[name].form}" for name in names)
        raise DataError(
            f"baselines: joint needs examples of one form, and the stages differ ({kinds}). Give all stages one form, "
            "or remove `baselines: [joint]`."
        ) from error
    before = accumulate((len(data[name].sources) for name in names), initial=0)
    places = [[n + place for place in data[name].train_sources] for n, name in zip(before, names, strict=False)]
    train, train_sources = joined(parts, seed=seed, sources=places)
    sources = tuple(chain.from_iterable(data[name].sources for name in names))
    return StageData(form, train, train.select([]), sources, train_sources)


def joint_train(recipe: Recipe, steps: int | None = None) -> Train:
    """Return the settings of joint training, for `steps` steps.

    Of several strategies, the carrier: the others care for earlier or later stages. Fields that all stages override
    alike are overridden here.
    """
    first, *others = (stage.train for stage in recipe.stages)
    alike = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}
    carrier = next(iter(make_strategies(recipe.train).parts))
    parameters = {carrier: recipe.train.parameters_of().get(carrier, {})}
    own = {"strategy": (carrier,), "parameters": parameters, "statistics": None}
    length = {"max_steps": steps} if steps else {}
    return Train.model_validate({**recipe.train.model_dump(), **alike, **own, **length})
