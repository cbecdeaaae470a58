"""One method and one recipe from outside."""

from dataclasses import dataclass

from vtprune import Recipe, Stage
from vtprune.core.recipes import RECIPES
from vtprune.core.select import top
from vtprune.methods.base import Cut, Method, MethodInfo, register


@register(
    MethodInfo(
        name="loudest",
        paper="an example, of no paper",
        idea="keeps the tokens whose features are longest",
        kinds=("projector",),
        score="norm of the token's features",
        cases=({"keep": 0.75}, {"keep": 2}),
    )
)
@dataclass(frozen=True, kw_only=True)
class Loudest(Method):
    def plan(self, geometry, keep):
        return (Cut(site="projector", keep=keep),)

    def select(self, view, cut):
        return top(view.features.norm(dim=-1), cut.keep, view.valid, view.protected)


stages = (Stage(method="loudest", keep=0.5), Stage(method="fastv", keep=0.25))
RECIPES.register("loudest-then-fastv", Recipe(name="loudest-then-fastv", stages=stages, source="an example"))
