"""What an address in a table of slices says: the url that is asked of the server, and after `#` what is wanted of it.

Rule files import this module: nothing but the standard library.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urldefrag, urlsplit

from workflow.errors import CatalogueError

DIGESTS = {"sha256": re.compile(r"[0-9a-f]{64}"), "md5": re.compile(r"[0-9a-f]{32}")}


@dataclass(frozen=True)
class Locator:
    """A parsed address.

    Attributes
    ----------
    url
        The address without its fragment.
    sha256, md5
        Hexadecimal digest of the file at the url (of the whole archive, if it is one); "" where the address pins none.
    members
        Paths or fnmatch patterns inside the archive at the url.
    prefix
        What the wanted names of a directory listing or a tar of flat files begin with.
    """

    url: str
    sha256: str = ""
    md5: str = ""
    members: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def host(self) -> str:
        """Host name of the url, lower case; "" where it has none."""
        return urlsplit(self.url).hostname or ""


def parse(address: str) -> Locator:
    """Split an address such as ``https://host/a.zip#md5=<32 hex digits>&member=*/spatial/*``.

    The fragment is ``key=value`` joined by ``&``, values percent-encoded; ``member`` may stand several times.

    Raises
    ------
    CatalogueError
        A key that is unknown, repeated or empty, or a digest that is none.
    """
    url, fragment = urldefrag(address)
    given: dict[str, list[str]] = {}
    for part in fragment.split("&") if fragment else []:
        key, _, value = part.partition("=")
        given.setdefault(key, []).append(unquote(value))
    for key, values in given.items():
        if key not in ("sha256", "md5", "member", "prefix") or not all(values):
            raise _wrong(address, f"{key}={values[0]}")
        if (key != "member" and len(values) > 1) or (key in DIGESTS and not DIGESTS[key].fullmatch(values[0])):
            raise _wrong(address, "&".join(f"{key}={value}" for value in values))
    single = {key: values[0] for key, values in given.items() if key != "member"}
    return Locator(url, members=tuple(given.get("member", ())), **single)


def _wrong(address: str, found: str) -> CatalogueError:
    return CatalogueError(
        f"address {address}: found {found!r} after '#'; expected sha256=<64 hex digits>, md5=<32 hex digits>, "
        "member=<path or pattern in the archive> or prefix=<beginning of the names>, joined by '&'. "
        "Next step: correct it in the table of slices."
    )
