"""The table of member families. Code for weights of any kind loops over it. Imports no torch."""

from __future__ import annotations

from ensemble.errors import WeightsBroken
from ensemble.families.base import Family
from ensemble.families.nnunet_v1.family import NnunetV1
from ensemble.families.nnunet_v2.family import NnunetV2
from ensemble.families.nvauto.family import Nvauto
from ensemble.families.spec import ENTRY_FILES, MemberSpec
from ensemble.families.swan.family import Swan

#: Kinds of members, by the manifest's words. A folder that two of them recognise is of the first one's kind.
FAMILIES: tuple[Family, ...] = (NnunetV2(), NnunetV1(), Nvauto(), Swan())
#: Endings of the files of packed members.
PACKED_SUFFIXES = frozenset({".json", ".safetensors", ".onnx"})


def family_of(spec: MemberSpec) -> Family:
    """Return the family of a member. Raises WeightsBroken for an unknown kind."""
    for family in FAMILIES:
        if family.kind == spec.kind:
            return family
    raise WeightsBroken(
        f"member {spec.name} has the unknown kind {spec.kind!r}",
        where=spec.folder,
        found=f"known: {', '.join(family.kind for family in FAMILIES)}",
        do=f"correct kind in {ENTRY_FILES}",
    )


def weight_suffixes() -> frozenset[str]:
    """Return the suffixes of all files that affect what any member predicts."""
    return PACKED_SUFFIXES.union(*(family.suffixes for family in FAMILIES))
