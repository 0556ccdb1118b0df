"""The audit: do the rewards of a grpo stage pay for known good answers, and not for known bad ones?"""
