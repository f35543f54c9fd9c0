"""The mesh, and the processes of a job."""
