"""A small cloud on this machine: moto's S3, Batch and IAM on a free port, and the environment in which Metaflow finds it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

REGION = "us-east-1"
BUCKET = "unigrpo-tests"


class Quiet(WSGIRequestHandler):
    """No line a request."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def cloud() -> Iterator[dict[str, str]]:
    """Serve until the block ends. Yields the environment of commands that should use it."""
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    env = {"METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_DATASTORE_SYSROOT_S3": f"s3://{BUCKET}/metaflow",
           "METAFLOW_DATATOOLS_S3ROOT": f"s3://{BUCKET}/data", "METAFLOW_S3_ENDPOINT_URL": url, "AWS_ENDPOINT_URL": url,
           "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION,
           "AWS_EC2_METADATA_DISABLED": "true", "METAFLOW_USER": "test", "METAFLOW_S3_RETRY_COUNT": "1",
           "METAFLOW_S3_WORKER_COUNT": "2",  # processes an upload starts; 64 by default
           "METAFLOW_ECS_S3_ACCESS_IAM_ROLE": "arn:aws:iam::123456789012:role/batch", "METAFLOW_SFN_DYNAMO_DB_TABLE": "table",
           "METAFLOW_SFN_IAM_ROLE": "arn:aws:iam::123456789012:role/sfn"}
    try:
        client(env, "s3").create_bucket(Bucket=BUCKET)
        yield env
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client(env: dict[str, str], service: str) -> Any:
    """A boto3 client of this cloud."""
    return boto3.client(service, endpoint_url=env["AWS_ENDPOINT_URL"], region_name=REGION, aws_access_key_id="test",
                        aws_secret_access_key="test")


def make_queue(env: dict[str, str], name: str) -> None:
    """A Batch queue with a compute environment behind it."""
    iam, batch = client(env, "iam"), client(env, "batch")
    role = iam.create_role(RoleName=f"role-{name}", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    ec2 = client(env, "ec2")
    subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    profile = iam.create_instance_profile(InstanceProfileName=f"profile-{name}")["InstanceProfile"]["Arn"]
    hardware = {"type": "EC2", "minvCpus": 0, "maxvCpus": 8, "instanceTypes": ["optimal"], "subnets": [subnet],
                "securityGroupIds": [ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]], "instanceRole": profile}
    made = batch.create_compute_environment(computeEnvironmentName=f"env-{name}", type="MANAGED", state="ENABLED",
                                            serviceRole=role, computeResources=hardware)["computeEnvironmentArn"]
    batch.create_job_queue(jobQueueName=name, state="ENABLED", priority=1,
                           computeEnvironmentOrder=[{"order": 1, "computeEnvironment": made}])
