"""A whole run as a job: python -m jobs.pipeline CONFIG.yaml [--set key=value] [--until STAGE] …"""

from jobs import start

if __name__ == "__main__":
    start("run")
