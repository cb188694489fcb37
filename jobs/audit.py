"""An audit as a job: python -m jobs.audit --auditor DIR --pairs PATH --out DIR …"""

from jobs import start

if __name__ == "__main__":
    start("audit")
