"""Lets a downstream Hydra application compose the config groups of lightning-mmembed.

Hydra finds every module of the namespace package ``hydra_plugins`` by itself. With lightning-mmembed installed, an
application may write ``data=mini`` or ``+experiment=...`` and gets the files shipped in ``lightning_mmembed.conf``.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningMMEmbedSearchPathPlugin(SearchPathPlugin):
    """Appends ``pkg://lightning_mmembed.conf`` to Hydra's search path, behind the application's own configs."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the shipped config groups; the application's files of the same name win.

        Args:
            search_path: the search path of the application that is being composed.
        """
        search_path.append(provider="lightning-mmembed", path="pkg://lightning_mmembed.conf")
