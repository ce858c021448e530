"""The network shell: who is there, who may speak, and how bytes get across."""
