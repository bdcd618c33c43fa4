"""Addresses in object stores (``s3://``, ``gs://``, ``az://``), and the file systems of fsspec for them.

:func:`merging.object_stores.connection.connect` is the only place that opens a connection. Credentials come from the
settings of each driver alone, never from an address.
"""

__all__: list[str] = []
