"""Judges: vision-language models behind OpenAI-compatible endpoints, asked by protocols that never invent a number.

question   what is asked and what came back: Picture, Question, Reply
png        pictures as files, at little cost
endpoint   one server: a single exchange, with every answer distrusted until checked
judge      Judge: deadline, retries, circuit breaker, hedging, cache, counters over all servers of one model
reading    from an answer to a value, or Undecided
protocols/ one file a way of asking
scorer     the base of scorers that ask a judge
probe      what a judge falls for: `python -m reward_servers judge probe`
vllm       a vLLM server as a child: started, watched, restarted: `python -m reward_servers judge up`
"""
