"""A sweep as a job: python -m jobs.sweep CONFIG …"""

from jobs import start

if __name__ == "__main__":
    start("sweep")
