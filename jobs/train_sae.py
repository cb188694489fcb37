"""Stage 4 as a job: python -m jobs.train_sae --activations DIR --out DIR [--config CONFIG.yaml] …"""

from jobs import start

if __name__ == "__main__":
    start("sae")
