"""Stage 2 as a job: python -m jobs.train_reward --pairs DIR --out DIR [--config CONFIG.yaml] …"""

from jobs import start

if __name__ == "__main__":
    start("reward")
