"""Imported by `warm_start`: the grammars of Hydra and OmegaConf, which are quick with what they have parsed before."""

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

OverridesParser.create().parse_overrides(["a=b", "a.b=1", "+a.b=[x,y]", "~a", "a='b ${c}'", "a={b:1.5}", "a=null,true"])
OmegaConf.to_container(OmegaConf.create({"a": "${b.c}/${oc.env:HOME,x}", "b": {"c": "${d}-y"}, "d": 1}), resolve=True)
