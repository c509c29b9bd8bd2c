"""Simulate stroke mimics: patients without an acute infarct who have bright DWI or apparent damage that a mask must not contain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from training.acquisition import Acquired, acquire, draw_spacing
from training.anatomy import Person, load_head, random_person
from training.draw import Draw
from training.lesions import Damage, tissue_share
from training.simulate import SHARED, brighten_plexus, emphasise_tracts
from training.tissues import ParameterMaps, parameter_maps

Mimic = Callable[[ParameterMaps, Tensor, Draw], None]


def blob(tissue: Tensor, radius_mm: float, draw: Draw) -> Tensor:
    """Distance (mm, 0 at the centre) to a random place in tissue, its shells uneven; a tensor (z, y, x) at 1 mm."""
    places = torch.nonzero(tissue)
    centre = places[draw.integer(0, len(places))].float()
    axes = [torch.arange(n, dtype=torch.float32) - c for n, c in zip(tissue.shape, centre, strict=True)]
    stretch = [draw.lognormal(1.0, 0.2) for _ in range(3)]
    z, y, x = torch.meshgrid(*(axis * s for axis, s in zip(axes, stretch, strict=True)), indexing="ij")
    distance = (z**2 + y**2 + x**2).sqrt()
    return distance * (1 + 0.15 * draw.field(tuple(tissue.shape), max(4.0, radius_mm))[0])


def shine_through(maps: ParameterMaps, tissue: Tensor, draw: Draw) -> None:
    """T2 shine-through: one to four places with a long T2 and a raised ADC."""
    for _ in range(draw.integer(1, 5)):
        radius = draw.uniform(4, 12)
        inside = (blob(tissue, radius, draw) < radius) * tissue
        maps.t2_ms *= 1 + draw.uniform(0.7, 1.3) * inside
        maps.adc *= 1 + draw.uniform(0.1, 0.4) * inside


def old_infarct(maps: ParameterMaps, tissue: Tensor, draw: Draw) -> None:
    """A cavity of 3 to 30 mm: nearly water."""
    radius = draw.uniform(6, 22)
    inside = (blob(tissue, radius, draw) < radius) * tissue
    maps.t2_ms *= 1 + draw.uniform(1.0, 2.5) * inside
    maps.adc *= 1 + draw.uniform(0.8, 2.2) * inside


def susceptibility(maps: ParameterMaps, tissue: Tensor, draw: Draw) -> None:
    """Pile up signal beside a signal void, as around a haemorrhage or metal, equally in DWI and b0; ADC stays unchanged."""
    radius = draw.uniform(5, 14)
    distance = blob(tissue, radius, draw)
    maps.proton_density *= 1 + draw.uniform(0.8, 2.5) * ((distance < 1.4 * radius) & (distance > radius)) * tissue
    maps.proton_density *= 1 - 0.95 * (distance < radius) * tissue


def ring(maps: ParameterMaps, tissue: Tensor, draw: Draw) -> None:
    """A ring of restricted diffusion about a watery core within oedema, as of a metastasis or demyelination."""
    for _ in range(draw.integer(1, 3)):
        radius = draw.uniform(7, 15)
        distance = blob(tissue, radius, draw)
        wall, core = (distance < radius) & (distance > 0.7 * radius), distance < 0.7 * radius
        oedema = (distance < 1.6 * radius) & (distance >= radius)
        maps.adc *= 1 + (-draw.uniform(0.2, 0.4) * wall + draw.uniform(0.8, 1.8) * core + 0.5 * oedema) * tissue
        maps.t2_ms *= 1 + (0.3 * wall + 1.0 * core + 0.6 * oedema) * tissue


def tumour(maps: ParameterMaps, tissue: Tensor, draw: Draw) -> None:
    """A cellular core in a large oedema: bright on DWI, its ADC a little low to normal."""
    radius = draw.uniform(9, 20)
    distance = blob(tissue, radius, draw)
    core, oedema = distance < radius, (distance < 1.8 * radius) & (distance >= radius)
    maps.adc *= 1 + (draw.uniform(-0.25, 0.1) * core + 0.6 * oedema) * tissue
    maps.t2_ms *= 1 + (draw.uniform(0.3, 0.7) * core + 0.7 * oedema) * tissue


MIMICS: Mapping[str, Mimic] = {
    "shine_through": shine_through,
    "old_infarct": old_infarct,
    "susceptibility": susceptibility,
    "ring": ring,
    "tumour": tumour,
}


def mimic(kind: str, seed: int, head: int, shared: Path = SHARED) -> Acquired:
    """The patient of one seed, with one of the label maps, with something that is no infarct: a row of `MIMICS`."""
    draw = Draw(seed)
    person: Person = random_person(load_head(shared, head), draw)
    grid = draw_spacing(draw)
    maps = parameter_maps(person.classes, draw)
    emphasise_tracts(maps, person.tract, draw)
    brighten_plexus(maps, person.classes, draw)
    tissue = tissue_share(person.classes)
    MIMICS[kind](maps, tissue, draw)
    return acquire(person, maps, Damage.none(tissue), grid, draw)
