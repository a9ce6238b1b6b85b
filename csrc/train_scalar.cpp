#include "train_body.h"

namespace kvern {
const TrainKernels kScalarTrain = kTrainKernels;
}
