"""One notebook with several parameters, then one that takes all their results."""

from airflow.sdk import DAG

from mlpkg.airflow.dags import notebook_step, recorded_run
from mlpkg.airflow.operators import NotebookOperator

with DAG("mapped", schedule=None, doc_md=__doc__):
    with recorded_run():
        count = NotebookOperator.partial(
            task_id="count", input_nb="notebooks/10_count.ipynb", map_index_template="{{ task.parameters['rows'] }}"
        ).expand(parameters=[{"rows": 1}, {"rows": 2}])
        count >> notebook_step("notebooks", "30_total", parameters={"counts": count.output})
