"""The command line: each verb parses, builds, calls — nothing else. Heavy imports wait inside the verbs."""
