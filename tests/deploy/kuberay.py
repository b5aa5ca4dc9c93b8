"""Schemas of the objects that Kubernetes itself does not know, as far as they are used here.

`RAY_SERVICE`: the fields of `ray.io/v1` that KubeRay 1.7.0's API reference lists, without those of
other ways of running: suspension, history server, the operator's own TLS and network policies,
fault tolerance of the head. No package brings the CRD itself. Pod templates are checked against
Kubernetes' own schema.
"""

from typing import Any

Schema = dict[str, Any]


def record(required: str = "", **fields: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANY: Schema = {"type": "object"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
METADATA = record("name", name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)

_HEAD = record(
    "rayStartParams template",
    rayStartParams=TEXTS,
    template=ANY,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    headService=ANY,
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
)
_WORKERS = record(
    "groupName rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts=COUNT,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=ANY,
)
_CLUSTER = record(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=record(mode=one_of("disabled", "token"), secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    headServiceAnnotations=TEXTS,
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
_UPGRADE = record(
    type=one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
    clusterUpgradeOptions=record(
        gatewayClassName=TEXT,
        maxSurgePercent=COUNT,
        stepSizePercent=COUNT,
        intervalSeconds=COUNT,
    ),
)
RAY_SERVICE = record(
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayService"),
    metadata=METADATA,
    spec=record(
        "serveConfigV2 rayClusterConfig",
        serveConfigV2=TEXT,
        rayClusterConfig=_CLUSTER,
        upgradeStrategy=_UPGRADE,
        rayClusterDeletionDelaySeconds=COUNT,
        excludeHeadPodFromServeSvc=FLAG,
        serveService=ANY,
    ),
)

_SECRET_KEY = record("name key", name=TEXT, key=TEXT)
POD_MONITOR = record(
    "apiVersion kind metadata spec",
    apiVersion=one_of("monitoring.coreos.com/v1"),
    kind=one_of("PodMonitor"),
    metadata=METADATA,
    spec=record(
        "selector podMetricsEndpoints",
        selector=record(matchLabels=TEXTS, matchExpressions={"type": "array", "items": ANY}),
        podMetricsEndpoints={
            "type": "array",
            "minItems": 1,
            "items": record(
                "port path",
                port=TEXT,
                path=TEXT,
                interval=TEXT,
                authorization=record("credentials", type=TEXT, credentials=_SECRET_KEY),
            ),
        },
    ),
)
