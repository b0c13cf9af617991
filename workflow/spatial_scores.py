"""How smooth a map of domains is, without asking whether it is right: CHAOS and PAS, as SDMBench defines them.

Both are low for a smooth map, and lowest for one single domain: they are read beside those of the true labels.
"""

import numpy as np
from scipy.spatial import cKDTree

from workflow.controls import nearest

N_NEAREST = 10  # spots that PAS looks at
FEWEST = 3  # spots of a domain that counts in CHAOS


def chaos(domains: np.ndarray, position: np.ndarray) -> float:
    """Mean distance of a spot to the nearest other one of its domain, both axes scaled to standard deviation 1.

    Domains of one or two spots add nothing to the sum, but their spots count in the mean: a fragment is not punished
    by its distance. NaN without spots. Yuan et al. 2024 (SDMBench), after Shang & Zhou 2022 (SpatialPCA).

    Parameters
    ----------
    domains
        int [n].
    position
        float [n, 2], in any unit.
    """
    if not len(domains):
        return float("nan")
    spread = position.std(axis=0)
    scaled = (position - position.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    total = 0.0
    for domain in np.unique(domains):
        of_domain = scaled[domains == domain]
        if len(of_domain) >= FEWEST:
            total += cKDTree(of_domain).query(of_domain, k=2)[0][:, 1].sum()
    return float(total / len(domains))


def ten_nearest(position: np.ndarray) -> np.ndarray:
    """The 10 spots nearest to each, itself left out; int [n, 10], or [n, n - 1] of fewer than 11 spots.

    Of equal distances the first spots are taken, so that the answer doesn't depend on a search tree: on a staggered
    lattice the 10 are the 6 neighbours and 4 of the 6 spots of the second ring's inner half.
    """
    n = len(position)
    _, index = nearest(position, N_NEAREST)
    index = index.reshape(n, -1)
    itself_first = np.argsort(index != np.arange(n)[:, None], axis=1, kind="stable")
    return np.take_along_axis(index, itself_first, axis=1)[:, 1:]


def pas(domains: np.ndarray, near: np.ndarray) -> float:
    """Proportion of abnormal spots: those of which more than half of the 10 nearest spots are in other domains.

    With ten neighbours that is six or more. NaN without spots. Yuan et al. 2024 (SDMBench), after Shang & Zhou 2022
    (SpatialPCA).

    Parameters
    ----------
    domains
        int [n].
    near
        int [n, k], places of each spot's nearest ones: `ten_nearest`.
    """
    if not len(domains):
        return float("nan")
    differ = (domains[near] != domains[:, None]).sum(axis=1)
    return float((differ > near.shape[1] / 2).mean())
