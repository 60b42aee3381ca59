import sys,json,time,os,torch
i=int(sys.argv[1]); out=sys.argv[2]
V=[dict(layers=3,hidden=64,intermediate=96,heads=1),dict(layers=3,hidden=64,intermediate=192,heads=2),dict(layers=4,hidden=64,intermediate=128,heads=1),
   dict(layers=3,hidden=96,intermediate=192,heads=1),dict(layers=4,hidden=96,intermediate=256,heads=2),dict(layers=3,hidden=64,intermediate=96,heads=1),dict(layers=6,hidden=64,intermediate=128,heads=1)]
PC=[(.9,2.),(.9,2.),(.9,2.),(.9,2.),(.9,2.),(.9,3.),(.9,2.)]
from dimo.worlds.shapes import ShapesWorld
from dimo.worlds import teacher as T
from dimo.worlds.oracle import score, summarise
from dimo.ursa import *
torch.set_num_threads(1)
w=ShapesWorld(); a,c=PC[i]
steps=int(os.environ.get('STEPS',16000)); dev=os.environ.get('DEV','cuda')
t0=time.time()
m=T.train_teacher(w,steps=steps,lr=2e-3,device=dev,alpha=a,c=c,progress=False,**V[i])
tt=time.time()-t0
T_=None
path=MetricPath(w.codebook().to(dev),a,c)
ids=T.encode(w,w.prompts).to(dev).repeat_interleave(64,0); pr=[p for p in w.prompts for _ in range(64)]
r={}
for s in (1,4,8,25):
    x=sample(m,path,ids,w.latents_shape,s)
    u=summarise(w,score(w,x,pr)); r[s]=(round(u['validity'],4),round(u['adherence'],3),u['coverage'])
torch.save({k:v.half() if 0 else v.cpu() for k,v in m.state_dict().items()},f'{out}/teacher{i}.pt')
print(i,V[i],(a,c),'params',sum(p.numel() for p in m.parameters()),'%.0fs'%tt,r,flush=True)
