"""The ops at BERT's shapes, as every op benchmark has them: ours, the specification, what others compute it with, and
the work it takes. One module per op family; `lists` has the GPU pass's, `shapes` the sizes of real batches."""
