"""Work on a Ray cluster: its settings, the connection to it, and a map over tasks."""

from merging.cluster.connection import connect
from merging.cluster.settings import RayCluster, make_cluster
from merging.cluster.tasks import Parcel, WorkerLost, map_tasks

__all__ = ["Parcel", "RayCluster", "WorkerLost", "connect", "make_cluster", "map_tasks"]
